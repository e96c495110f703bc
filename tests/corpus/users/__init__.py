"""Files as users of TorchServe 0.12 have them, each with what it means there.

Archives by plain `zip` and `tar`, manifests of old packers and of text editors, config.properties, snapshots and
model-config.yaml. All of them are small and made up here; what is taken from the field is their form.
"""
