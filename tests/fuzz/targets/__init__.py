"""What is fuzzed: each target takes bytes, and raises where a promise about them is broken.

A target knows what the code may answer (its own error class, with a text for a client) and what has to hold of what it
accepts. `fuzz.run` feeds them with what atheris finds, `fuzz/test_corpus.py` with what is kept in the corpus.
"""

from __future__ import annotations

from collections.abc import Callable

from fuzz.targets import archives, files, http, memory, text

Target = Callable[[bytes], None]

TARGETS: dict[str, Target] = {
    "head": http.head,
    "trace_context": http.trace_context,
    "chunked": http.chunked,
    "form": http.form,
    "json": http.json_body,
    "access": http.access,
    "zip": archives.zip_archive,
    "tar": archives.tar_archive,
    "manifest": archives.manifest,
    "model_yaml": archives.model_yaml,
    "properties": files.properties,
    "config": files.config,
    "log4j2": files.log4j2,
    "log_config": files.log_config,
    "workflow": files.workflow,
    "model_entries": files.model_entries,
    "url": text.url,
    "metric_line": text.metric_line,
    "log_text": text.log_text,
    "answer_slot": memory.answer_slot,
    "request_slot": memory.request_slot,
    "stream_ring": memory.stream_ring,
}
