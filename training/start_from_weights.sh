#!/usr/bin/env bash
# Weights from CIFAR-10 against a start from nothing, with the same budget of steps, on other images and channels.
#
#     training/start_from_weights.sh DATA [RUNS] [STEPS]
#
# DATA holds the folders cifar10, fashion_mnist_3k and imagenette128. RUNS (runs/start) gets a run folder for each setting.
# The cards there have k-NN and health before the first step and after the last, and the linear probe is added.
set -euo pipefail
data=$1 runs=${2:-runs/start} steps=${3:-1000}
here=$(cd "$(dirname "$0")" && pwd)
common="--max_steps $steps --per_device_train_batch_size 64 --warmup_steps 0.1"
source=$runs/cifar10

[ -e "$source/README.md" ] || hf-mim pretrain "$here/recipes/cifar10_mae.yaml" --dataset "$data/cifar10" --output_dir "$source"
for bands in 1 10; do
    [ -e "$runs/bands$bands" ] || python "$here/bands.py" "$data/imagenette128" "$runs/bands$bands" 2000 $bands
done

compare() { # name, dataset, image size, channels
    local kind="--dataset $2 --image_size $3 --patch_size 4 --num_channels $4"
    local nothing="--size tiny --decoder_hidden_size 64 --decoder_num_hidden_layers 2"
    for rate in 5e-4 2e-3; do
        for start in "weights --init_from $source" "decay --init_from $source --encoder_layer_decay 0.75" "nothing $nothing"; do
            local folder=$runs/${1}_${start%% *}_$rate
            [ -e "$folder/README.md" ] ||
                hf-mim pretrain ${start#* } $kind $common --learning_rate $rate --output_dir "$folder"
            hf-mim evaluate linear "$folder" --dataset "$2"
            hf-mim card "$folder"
        done
    done
}

compare fashion "$data/fashion_mnist_3k" 28 1
compare imagenette_gray "$runs/bands1" 64 1
compare imagenette_bands "$runs/bands10" 64 10
