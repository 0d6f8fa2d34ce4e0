"""What plugs SpatialScore into a trainer: one module per framework, none of which imports another's.

A module that needs no argument for the server finds it in the environment: SPATIALSCORE_TARGET, see
`spatialscore_client.settings.from_environment`. A picture that cannot be scored raises, so that no trainer ever
normalises a made-up reward.
"""
