"""Imported by the process that others are forked from: loads what Pillow, Parquet and S3 load when first used."""

import botocore.session
import pyarrow as pa
from PIL import Image

from pipeline.layout import from_parquet, to_parquet

Image.init()
from_parquet(to_parquet(pa.table({"a": [1]})))
botocore.session.get_session().get_service_model("s3")
