"""
Images in tiles, as InternVL has them (arXiv 2412.05271): a model that sees squares of one size sees a large image as
several of them, row by row, and the whole image brought to that size behind them. Which image is cut into how many:
plumbing.pixels.tile_grid; prepare/ stores it in whole tiles.

Letters: I images, H, W their height and width, S pixels along a tile, N tokens of an image.
"""

import numpy as np
import torch
import torch.nn.functional as F


def count_tiles(height, width, S):
    """How many squares an image of so many pixels, numbers or arrays, is seen as."""
    tiles = (height // S) * (width // S)
    return tiles + (tiles > 1)


def cut_tiles(images, S):
    """(I, 3, H, W) of whole tiles -> (I * n, 3, S, S): of each image its tiles and, behind several, all of it."""
    tiles = images.unflatten(3, (-1, S)).unflatten(2, (-1, S))  # (I, 3, rows, S, columns, S)
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (I, rows * columns, 3, S, S)
    if tiles.shape[1] > 1:
        whole = F.interpolate(images, (S, S), mode="bicubic", antialias=True)
        tiles = torch.cat([tiles, whole[:, None]], dim=1)
    return tiles.flatten(0, 1)


def map_of_tiles(values, rows, columns):
    """
    Numbers (N,), such as the attention to each token of an image of rows x columns tiles, as one map of the image:
    those of a tile where it lies, and those of the whole image behind the tiles shared among the places that each
    covers, so that their sum stays. Class tokens, the first of each tile where there are any, are nowhere, and left
    out.
    """
    tiles = values.reshape(count_tiles(rows, columns, 1), -1)
    side = int(tiles.shape[1] ** 0.5)
    *tiles, whole = tiles[:, tiles.shape[1] - side ** 2:].reshape(-1, side, side)
    if not tiles:
        return whole
    shares = whole.repeat(rows, 0).repeat(columns, 1) / (rows * columns)
    return shares + np.reshape(tiles, (rows, columns, side, side)).swapaxes(1, 2).reshape(shares.shape)
