"""Every error solpath raises on purpose. All derive from `SolpathError`."""


class SolpathError(Exception):
    """Root of the errors below: `except solpath.SolpathError` catches everything expected."""


class ConfigError(SolpathError):
    """A setting is out of its range. The message names the field and the range."""


class UnsupportedModelError(SolpathError):
    """The model cannot be searched or cut. The message says which module and why."""


class BatchError(SolpathError):
    """The batches are empty, on another device, or not what the model takes."""


class BudgetError(SolpathError):
    """A budget cannot be met. The message gives the reachable range."""


class FingerprintError(SolpathError):
    """A path, plan or checkpoint belongs to another model or run. The message says what differs."""


class FileError(SolpathError):
    """A file or folder is damaged, missing, or not writable. The message names file and field."""


class NonFiniteLossError(SolpathError):
    """The loss became NaN or infinite. The message names the step."""
