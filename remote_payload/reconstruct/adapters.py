"""Finding the user's adapter and calling into it: what goes wrong in there is told as the adapter's, by method."""

from __future__ import annotations

import contextlib
import importlib
import traceback
from collections.abc import Iterator
from typing import Any

from remote_payload.reconstruct.protocol import Adapter, AdapterConfig, AdapterError
from remote_payload.wire.names import printable
from remote_payload.wire.plan import EvaluationSettings

_METHODS = ("build_model", "map_state_dict", "modalities", "samples", "collate", "predict")
_DEFAULTED = ("data_names", "split", "dependence", "train_reference", "finish_model")


class AdapterCallError(AdapterError):
    """Code of the adapter raised. `method` says where; the cause is the original exception with its traceback."""

    def __init__(self, method: str, error: BaseException) -> None:
        super().__init__(f"the adapter's {method} failed: {type(error).__name__}: {printable(str(error))[:1000]}")
        self.method = method
        frames = traceback.extract_tb(error.__traceback__)
        self.raised_at = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def resolve_adapter(name: str) -> Adapter:
    """An instance of the class that `module:Class` names. Raises `AdapterError` in a sentence."""
    module_name, colon, class_name = name.partition(":")
    if not (module_name and colon and class_name):
        raise AdapterError(f"the adapter {name!r} does not have the form module:Class")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise AdapterError(
                f"there is no module {module_name!r} here: is the adapter's file among the code that is shipped?"
            ) from error
        raise AdapterCallError("import", error) from error
    except Exception as error:
        raise AdapterCallError("import", error) from error
    for part in class_name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise AdapterError(f"the module {module_name!r} has no class {class_name!r}")
    with calling("constructor"):
        adapter = found()
    missing = [m for m in _METHODS if not callable(getattr(adapter, m, None))]
    if missing:
        raise AdapterError(f"{name} is no adapter: it has no {', '.join(missing)}")
    incomplete = [m for m in _DEFAULTED if not hasattr(adapter, m)]
    if incomplete:
        raise AdapterError(f"{name} has no {', '.join(incomplete)}; subclass AdapterBase for the defaults")
    complete: Adapter = adapter
    return complete


@contextlib.contextmanager
def calling(method: str) -> Iterator[None]:
    """Around a call into the adapter: whatever it raises becomes an `AdapterCallError` that names the method.

    Running out of memory passes through: halving the batch may mend it.
    """
    try:
        yield
    except (AdapterError, MemoryError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise AdapterCallError(method, error) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory (or the host's) ran out."""
    import torch

    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))


def adapter_config(settings: EvaluationSettings, checkpoint_config: dict[str, Any]) -> AdapterConfig:
    return AdapterConfig(
        user=settings.user_config,
        user_name=settings.user_config_name,
        user_text=settings.user_config_text,
        checkpoint=checkpoint_config,
        seed=settings.seed,
    )
