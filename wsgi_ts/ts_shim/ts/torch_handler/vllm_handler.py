from wsgi_ts.handlers.bundled.vllm import VLLMHandler
