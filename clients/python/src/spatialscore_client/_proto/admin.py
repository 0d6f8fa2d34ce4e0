# Made by `make client-stubs` from the contract. Do not edit.
"""The messages of spatialscore/v1/admin.proto."""

from .pool import messages

globals().update(messages("spatialscore/v1/admin.proto"))
