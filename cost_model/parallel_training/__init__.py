"""Time and memory of transformer training steps on meshes of devices, predicted from shape, mesh and device files."""
