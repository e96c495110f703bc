#!/bin/sh
# What a container runs: "serve" (and flags) starts the server; any other command is run as it is, as TorchServe's images do.
# The server becomes the container's first process, so that it gets the signals.
set -e

# Shells in TorchServe's images read the words once more: a whole command may be in one word, or a flag with its value.
case ${1%%[[:space:]]*} in
    serve | torchserve | wsgi-ts)
        for word in "$@"; do
            case ${word%%[[:space:]]*} in
                "$word" | *=*) ;;
                serve | torchserve | wsgi-ts | -*) eval "exec \"\$0\" $*" ;;
            esac
        done
        ;;
esac

# The file that the server will read, and whether its flags name a model store.
file='' store='' before=''
for word in "$@"; do
    case $before in
        --ts*=*) ;;
        --ts*) file=$word ;;
    esac
    case $word in
        --ts*=*) file=${word#*=} ;;
        --model-*) store=given ;;
    esac
    before=$word
done
file=${TS_CONFIG_FILE:-$file}

# TorchServe's images have file and store here: where neither ours is given, what is mounted for them counts.
home=/home/model-server models=/mnt/models
if [ -z "$file" ]; then
    file=config.properties
    if [ ! -e "$file" ] && [ -e "$home/$file" ]; then
        file=$home/$file
        export TS_CONFIG_FILE="$file"
    fi
fi
if [ ! -d "$models" ] && [ -d "$home/model-store" ]; then
    models=$home/model-store
fi

# by_default KEY VALUE: a variable goes before flags and file, so the image's value must only be there where nobody has given one.
by_default() {
    variable=TS_$(echo "$1" | tr '[:lower:]' '[:upper:]')
    if ! printenv "$variable" >/dev/null && ! grep -Eqs "^[[:blank:]]*$1[[:blank:]=:]" "$file"; then
        export "$variable=$2"
    fi
}

# Knative and Cloud Run say in PORT where they want it.
if [ -z "$K_SERVICE" ] || [ -z "$PORT" ]; then
    by_default inference_address http://0.0.0.0:8080
fi
by_default metrics_address http://0.0.0.0:8082
by_default metrics_mode prometheus
by_default grpc_inference_address 0.0.0.0
case "$1" in
    # Flags inside other commands (sh -c "torchserve …") are not seen here.
    serve | torchserve | wsgi-ts) [ -n "$store" ] || by_default model_store "$models" ;;
esac

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
