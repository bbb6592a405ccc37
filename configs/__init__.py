"""Hydra configuration groups: `train.yaml` is the entry; each folder is a group of parts."""
