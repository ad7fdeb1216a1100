"""Language models: loading and saving, where their parts are, reading and patching them, training them."""
