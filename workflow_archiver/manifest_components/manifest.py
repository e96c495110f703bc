from wsgi_ts.archiver.manifest import WorkflowManifest as Manifest
