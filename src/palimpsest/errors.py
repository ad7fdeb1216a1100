"""The project's own exceptions: one line each, saying what is wrong, where, and how to mend it."""


class PalimpsestError(Exception):
    """A mistake that the user can mend. The command line prints it in one line and exits with 2."""


class DataError(PalimpsestError):
    """A file of records cannot be read as asked; the message names file, row and field."""


class ModelError(PalimpsestError):
    """A model folder, tokenizer or architecture cannot be used."""


class SpecError(PalimpsestError):
    """A run's specification does not hold together."""


class UpdateError(PalimpsestError):
    """A change of weights does not belong to this model, or is already in it."""


class TrainingError(PalimpsestError):
    """Training or unlearning cannot go on: a loss that is not finite, say."""


class EvidenceError(PalimpsestError):
    """A run folder's evidence is missing, or was changed after it was written."""


class StorageError(PalimpsestError):
    """A file cannot be written; whatever stood there before is untouched."""
