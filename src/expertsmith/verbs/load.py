"""`load`: a checkpoint as a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from expertsmith.calibration.opening import opened_as
from expertsmith.checkpoint import open_checkpoint


def load(path: str | Path, *, as_type: str | None = None, **kwargs: Any) -> Any:
    """A transformers model of any checkpoint that expertsmith writes, ready to run: layers with different numbers of experts are built,
    and skip thresholds of its config.json are put in force. No code from the checkpoint is run.

    Quantised weights are decoded as they are read: transformers 5.23 runs some formats (modelopt, NVFP4 experts) without their scales, and
    others only with a package or GPU of their own. To run packed weights, load the checkpoint with an engine or with transformers itself.

    Args:
        kwargs: for `AutoModelForCausalLM.from_pretrained`; of a quantised checkpoint `dtype` and a `device_map` of one device.

    Raises:
        UserError: quantised weights that cannot be decoded, or another argument with them.
    """
    with opened_as(path, as_type, headers_only=True):
        return _load(path, **kwargs)


def _load(path: str | Path, **kwargs: Any) -> Any:
    from expertsmith.arch import family_of, record_of
    from expertsmith.checkpoint.floats import quantisation_of
    from expertsmith.engine.loading import load_decoded
    from expertsmith.engine.skipping import install
    from expertsmith.engine.uneven import load as load_module
    from expertsmith.surgery.skip import skip_of

    name, _, revision = str(path).partition("@")
    if revision and not Path(path).exists():  # owner/name@REVISION
        path, kwargs["revision"] = name, revision
    checkpoint = open_checkpoint(path, headers_only=True, revision=kwargs.get("revision"))
    if quantisation_of(checkpoint) is None:
        module = load_module(path, **kwargs)
    else:
        module = load_decoded(
            open_checkpoint(path, revision=kwargs.pop("revision", None)), record_of(checkpoint.config), **kwargs
        )
    config = checkpoint.config  # the module's own may be the text part only
    found = skip_of(config)
    if found is not None:
        install(module, family_of(config, str(path)), found[1], found[0])
    return module
