from wsgi_ts.archiver.manifest import Manifest, RuntimeType
