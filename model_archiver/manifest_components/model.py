from wsgi_ts.archiver.manifest import Model
