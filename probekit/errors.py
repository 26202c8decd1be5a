"""The named exceptions. Each message is one line: what is wrong, the value, what is allowed."""


class ProbekitError(Exception):
    """Base of all errors that a user can cause or mend; the command line prints the message and no traceback."""

    exit_code = 1


class ConfigError(ProbekitError, ValueError):
    """An option or a configuration file that cannot be used as written.

    It is a ValueError as well, so that pydantic adds the place to the message.
    """

    exit_code = 2


class PreferenceError(ProbekitError):
    """A preference file whose content cannot be used."""


class ImageError(ProbekitError):
    """An image file that is missing, damaged or refused."""


class ImageChangedError(ProbekitError):
    """An image file whose bytes are no longer those that it was listed with."""


class BackboneError(ProbekitError):
    """A backbone that cannot be loaded or probed."""


class DeviceMemoryError(BackboneError):
    """A device whose memory does not hold what has to be on it at once."""


class FeatureFileError(ProbekitError):
    """A file of features computed elsewhere whose content cannot be used."""


class ScoreFileError(ProbekitError):
    """A file of scores computed elsewhere whose content cannot be used."""


class StoreError(ProbekitError):
    """A feature store that is damaged, or was asked for something it does not hold."""


class NoStoreError(StoreError):
    """A path that was given for a feature store and holds none: a mistake of usage, like a path that is not there."""

    exit_code = 2


class VersionError(StoreError):
    """A feature store of a major version that this probekit does not read."""


class FingerprintError(StoreError):
    """A feature store that was made with other settings than the ones asked for."""


class HeadError(ProbekitError):
    """Arrays that no head can be fitted on."""


class ResultsError(ProbekitError):
    """A results folder that is damaged, or lacks what was asked for."""
