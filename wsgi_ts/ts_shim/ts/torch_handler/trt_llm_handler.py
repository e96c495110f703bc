from wsgi_ts.handlers.bundled.trt_llm import TRTLLMHandler
