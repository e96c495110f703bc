"""The gRPC APIs: one process, `python -m wsgi_ts.rpc`, with a segment of its own.

The messages are declared in `protos/*.proto`. What the server reads of them is `protos/descriptors.binpb`; after a
change of a .proto file it is made again with this command, and a test compares the two::

    python -m grpc_tools.protoc -I wsgi_ts/rpc/protos --include_imports \
        --descriptor_set_out=wsgi_ts/rpc/protos/descriptors.binpb \
        inference.proto management.proto open_inference_grpc.proto health.proto google/rpc/error_details.proto \
        xds/data/orca/v3/orca_load_report.proto

A descriptor set and not protoc's Python modules: those refuse every protobuf older than the protoc that wrote them,
which would decide on the versions of what users install beside the server.
"""
