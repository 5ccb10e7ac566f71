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
# Settings of the other methods. Gates of ConvNet-AIG and SkipNet learn faster.
convnet_aig=(--grid=method=convnet_aig --grid=budget=0.2,0.3,0.4
  '--grid=convnet_aig:learning_rate_factors=*.masker.fc2.bias:20'
  --grid=seed=0,1 --recipe='gates x20')
skipnet=(--grid=method=skipnet --grid=skip_weight=0.1,0.2,0.8
  '--grid=skipnet:learning_rate_factors=*.masker.*:20'
  --grid=seed=0,1 --recipe='gates x20')
sact=(--grid=method=sact --grid=ponder_weight=0.1,0.3,1 --grid=seed=0,1)
act=(--grid=method=act --grid=ponder_weight=0.1,0.3,1 --grid=seed=0,1)

# FOLDER FOLDER: their groups for `table`, with the predictions of ConvNet-AIG
# and SkipNet, and of SACT and ACT.
others() {
  local value
  for value in 0.4 0.3 0.2; do
    echo "ConvNet-AIG, budget $value=$1/convnet_aig_budget${value}_*"
  done
  for value in 0.1 0.2 0.8; do
    echo "SkipNet, weight $value=$1/skipnet_skip_weight${value}_*"
  done
  for value in 0.1 0.3 1; do
    echo "SACT, weight $value=$2/sact_ponder_weight${value}_*"
  done
  for value in 0.1 0.3 1; do
    echo "ACT, weight $value=$2/act_ponder_weight${value}_*"
  done
}
