"""What the pictures of a run show, in a sentence: the alternative text in cards and reports."""

CAPTIONS = {
    "reconstructions": "From above: images, what the encoder sees of them, and what the model predicts",
    "prediction": "From above: images, how well the features of each hidden patch are predicted, and the patches whose "
    "features are nearest to the prediction",
    "pca": "Images, and their patches coloured by the three main directions of the features: patches of like colours "
    "have like features",
    "loss": "Curves over the optimizer steps: the loss, and what else was logged",
}
