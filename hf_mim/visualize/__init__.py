"""Pictures: what a model sees, predicts and has learned. Each `plot_…` returns a figure, which a notebook shows.

from hf_mim.visualize import Viewer, plot_pca

viewer = Viewer.load("runs/textures_mae")
plot_pca(viewer, ["one.png", "two.png"]).save("pca.png")
"""

from hf_mim.visualize.curves import plot_training
from hf_mim.visualize.features import plot_attention, plot_clusters, plot_pca, plot_similarity
from hf_mim.visualize.neighbours import plot_map, plot_nearest
from hf_mim.visualize.pictures import PICTURES, fitting_pictures
from hf_mim.visualize.predictions import plot_masks, plot_noise, plot_prediction, plot_reconstructions
from hf_mim.visualize.viewer import Viewer

__all__ = [
    "PICTURES",
    "Viewer",
    "fitting_pictures",
    "plot_attention",
    "plot_clusters",
    "plot_map",
    "plot_masks",
    "plot_nearest",
    "plot_noise",
    "plot_pca",
    "plot_prediction",
    "plot_reconstructions",
    "plot_similarity",
    "plot_training",
]
