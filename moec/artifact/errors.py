"""What can be wrong with an artifact."""

from __future__ import annotations

from moec.ir.errors import MoecError


class ArtifactError(MoecError):
    """An artifact that cannot be read, or is not what its manifest says."""

    code = "artifact"


class InputError(MoecError):
    """Inputs that an artifact's entry does not take."""

    code = "input"
