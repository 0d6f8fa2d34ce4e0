"""The messages of the contract, made from `proto/` by `make client-stubs`."""
