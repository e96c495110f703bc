"""The settings of an instance that somebody has given, as text: for snapshots, and for plugins to read."""

from __future__ import annotations

import json
from typing import Any

from wsgi_ts.settings.config import Config, property_settings


def given_settings(config: Config) -> dict[str, str]:
    """The settings that are not at their defaults, and the addresses, as text that reads back as the same."""
    default = Config()
    rows = {}
    for key in property_settings():
        value = getattr(config, key)
        if key == "load_models":
            rows[key] = config.initial_models
        elif key == "load_workflows":
            rows[key] = ",".join(url if name is None else f"{name}={url}" for name, url in value)
        elif key != "model_snapshot" and (value != getattr(default, key) or key.endswith("_address")):
            rows[key] = _text(value)
    return {key: text for key, text in rows.items() if text}


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return json.dumps(value)
    return ",".join(value) if isinstance(value, tuple) else str(value)
