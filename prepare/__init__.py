"""From raw files to shards and safetensors. These modules enter their datasets in datasets.DATASETS."""

from prepare import questions, reports, studies, figures, choices, classify, boxes
