from wsgi_ts.archiver.writer import ArchiverError as ModelArchiverError
