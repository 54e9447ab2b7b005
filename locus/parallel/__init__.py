"""The processes of one job, in torch.distributed's words."""
