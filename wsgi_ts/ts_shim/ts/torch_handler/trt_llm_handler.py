"""Large language models run by TensorRT-LLM."""

from wsgi_ts.handlers.bundled.trt_llm import TRTLLMHandler
