"""Large language models run by TensorRT-LLM."""

from wsgi_ts.handlers.trt_llm import TRTLLMHandler

__all__ = ["TRTLLMHandler"]
