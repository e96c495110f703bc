from wsgi_ts.archiver.manifest import Workflow
