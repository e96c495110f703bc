"""Large language models behind OpenAI's interface, run by vLLM."""

from wsgi_ts.handlers.bundled.vllm import VLLMHandler
