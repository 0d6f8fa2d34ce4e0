# Made by `make client-stubs` from the contract. Do not edit.
"""The messages of error_details.proto."""

from .pool import messages

globals().update(messages("error_details.proto"))
