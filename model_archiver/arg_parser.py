from wsgi_ts.archiver.torchserve_api import ModelArgParser as ArgParser
