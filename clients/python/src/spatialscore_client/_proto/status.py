# Made by `make client-stubs` from the contract. Do not edit.
"""The messages of google/rpc/status.proto."""

from .pool import messages

globals().update(messages("google/rpc/status.proto"))
