"""Errors a user can mend: the command line prints them as one line, without a traceback."""


class PgolfError(Exception):
    """Base of the errors that name what was wrong, where, and what was wanted. `status`: the command's exit status."""

    status = 1


class ConfigError(PgolfError):
    """A configuration value, flag or environment variable that cannot be used."""


class DataError(PgolfError):
    """A text file, shard, tokenizer or manifest that is damaged or does not fit the others."""


class ArtifactError(PgolfError):
    """An artifact or checkpoint that is damaged, from a newer format, or not one at all."""


class LegalityError(PgolfError):
    """An evaluation that would break a rule of the benchmark (see model/evaluate/ledger.py)."""


class TrainError(PgolfError):
    """Training that cannot go on: a loss that is not finite, a batch that does not divide."""


class DeviceMemoryError(PgolfError):
    """A GPU that has too little memory for a stage (see model/memory.py)."""


class NotVerified(PgolfError):
    """`pgolf verify` could not say whether a score is legal; the exit status 1 means that it is not."""

    status = 2
