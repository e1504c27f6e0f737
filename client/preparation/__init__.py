"""Public image sets, from the folders that their authors hand out to a manifest with PNG files.

`catalogue` lists the sets, one line each; a set says in its own module what its folders look like and
where that is known from. Nothing is downloaded: whoever prepares a set has accepted its terms.
"""
