"""Teachers made from official foundation checkpoints.

`catalogue` names them, `layouts` knows their keys and shapes, `sources` reads files, `importing` converts.
"""
