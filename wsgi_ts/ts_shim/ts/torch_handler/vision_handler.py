from wsgi_ts.handlers.bundled.vision import VisionHandler
