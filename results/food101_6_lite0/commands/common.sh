# Names for the other files of this folder.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
scenes=workdir/food101_6_lite0_scenes
wide=workdir/food101_6_lite0_scenes_wide
photographs=workdir/food101_6_lite0_photographs
lite2=workdir/food101_6_lite2_scenes
late=blocks.4.1,blocks.4.2,blocks.5.1,blocks.5.2,blocks.5.3
nine=blocks.1.1,blocks.2.1,blocks.3.1,blocks.3.2,$late
late2=blocks.4.1,blocks.4.2,blocks.4.3,blocks.5.1,blocks.5.2,blocks.5.3,blocks.5.4
bias_rate='learning_rate_factors=*.masker.maskconv.conv.bias:20'
