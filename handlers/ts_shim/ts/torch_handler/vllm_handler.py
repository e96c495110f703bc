"""Large language models behind OpenAI's interface, run by vLLM."""

from wsgi_ts.handlers.vllm import VLLMHandler

__all__ = ["VLLMHandler"]
