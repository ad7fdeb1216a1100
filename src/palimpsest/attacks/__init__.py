"""Can someone get it back? Each attack also runs on gold, which never knew, and on the original, which still does."""
