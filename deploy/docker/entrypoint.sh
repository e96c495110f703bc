#!/bin/sh
# What a container runs: "serve" (and flags) starts the server; any other command is run as it is, as TorchServe's images do.
# The server becomes the container's first process, so that it gets the signals.
set -e
case "$1" in
    serve)
        shift
        exec wsgi-ts serve --ncs "$@"
        ;;
    torchserve)
        # Images of TorchServe go on with "tail -f /dev/null" behind a server in the background.
        shift
        exec torchserve --foreground "$@"
        ;;
    *)
        exec "$@"
        ;;
esac
