"""Tables of settings: a frozen dataclass whose fields are declared with `setting`, one field for one key.

There are three: config.properties (`wsgi_ts.settings.config`), model-config.yaml (`wsgi_ts.models.model_yaml`), and the
arguments of the calls that register and scale a model (`wsgi_ts.models.arguments`). The readers, the reference page
and the API description all go by the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.settings.kinds import Kind


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of a table.

    Attributes:
        default: what counts where nobody gives a value, as documented.
        help: one line for the reference page.
        key: as it is spelt in the file; empty: as the dataclass field.
        env: the environment variable that sets it (with `enable_envvars_config`), empty for `TS_{KEY}`, None where none
            may.
        env_always: the variable counts even without `enable_envvars_config`.
        is_key: whether people can set it (else the launcher fills it in).
        ours: a key that TorchServe does not know.
        has_effect: whether the server obeys it; false for keys of old files, which nothing here could obey.
        limits: further words of its OpenAPI schema, such as `maximum`.
    """

    kind: Kind
    default: Any
    help: str
    key: str = ""
    env: str | None = None
    env_always: bool = False
    is_key: bool = True
    ours: bool = False
    has_effect: bool = True
    limits: Mapping[str, Any] = field(default_factory=dict)

    def variable(self, name: str) -> str | None:
        """The environment variable that sets the key `name`, None where none may.

        It is `TS_` and the key; a key that begins with `ts_` does not get a second one.
        """
        if self.env != "":
            return self.env
        return name.upper() if name.startswith("ts_") else f"TS_{name.upper()}"


def setting(kind: Kind, default: Any, help: str, *, key: str = "", env: bool | str = True, **more: Any) -> Any:
    """Declares a dataclass field that is a key of a file.

    See Setting for the arguments, but `env`: True for `TS_{KEY}`, a name for another variable, False for none.
    """
    variable = env if isinstance(env, str) else "" if env else None
    return _field(Setting(kind, default, help, key, variable, **more), default)


def ours(kind: Kind, default: Any, help: str, **more: Any) -> Any:
    """Declares a key that TorchServe does not know; see `setting`."""
    return setting(kind, default, help, ours=True, **more)


def launch_value(kind: Kind, default: Any, help: str) -> Any:
    """Declares a dataclass field which the launcher fills in; no key of config.properties."""
    return _field(Setting(kind, default, help, is_key=False), default)


def argument(kind: Kind, default: Any, help: str, *, unset: Any = None, **limits: Any) -> Any:
    """Declares a dataclass field that is an argument of a call; `help` is one sentence for the API description.

    `default` is what counts where the caller says nothing, as documented, and `unset` the field's value then: None
    leaves the choice to others who may speak. `limits` are further words of its OpenAPI schema, such as `maximum`.
    """
    return _field(Setting(kind, default, help, limits=limits), unset)


def _field(row: Setting, default: Any) -> Any:
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata={"setting": row})
    return field(default=default, metadata={"setting": row})


def settings_of(table: type) -> dict[str, Setting]:
    """The rows of a table by field, in order."""
    return {each.name: each.metadata["setting"] for each in dataclasses.fields(table) if "setting" in each.metadata}
