from wsgi_ts.handlers.bundled.image import ImageSegmenter
