from wsgi_ts.archiver.torchserve_api import WorkflowArgParser as ArgParser
