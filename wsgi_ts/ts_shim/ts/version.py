from wsgi_ts import TORCHSERVE_VERSION as __version__
