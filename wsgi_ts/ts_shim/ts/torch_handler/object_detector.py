from wsgi_ts.handlers.bundled.image import ObjectDetector
