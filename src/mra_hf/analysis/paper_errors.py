"""Relative errors in Table 7 of the ICML 2022 paper, as far as they are known."""

_WINDOWS = (16, 32, 64, 128, 256, 512, 1024)
_BLOCKS = (1, 2, 4, 8, 16, 32, 64)

#: method -> (sizes, length -> error at each size; None where it is not known).
_ROWS: dict[str, tuple[tuple[int, ...], dict[int, tuple[float | None, ...]]]] = {
    "mra2": (_BLOCKS, {
        256: (0.44, 0.34, 0.21),
        512: (0.51, 0.40, 0.28, 0.15),
        1024: (0.61, 0.50, 0.40, None, None),
        2048: (0.72, 0.63, 0.53, None, None, 0.16),
        4096: (0.87, 0.78, 0.69, None, None, 0.32, 0.17),
    }),
    "mra2_s": (_BLOCKS, {
        256: (0.54, 0.40, 0.23),
        512: (0.63, 0.49, 0.33, 0.17),
        1024: (0.77, 0.61, 0.47, 0.31, 0.17),
        2048: (0.93, 0.78, 0.63, 0.47, 0.32, 0.17),
        4096: (1.14, 0.98, 0.83, 0.67, 0.51, 0.35, 0.19),
    }),
    "nystromformer": (_WINDOWS, {
        256: (0.70, 0.62, 0.55),
        512: (0.76, 0.69, 0.62, 0.55),
        1024: (0.83, None, 0.71, 0.63, 0.55),
        2048: (0.88, 0.84, 0.78, 0.72, 0.65, 0.57),
        4096: (0.91, 0.89, 0.85, 0.79, 0.73, 0.66, 0.58),
    }),
    "longformer": (_WINDOWS, {
        256: (0.55, 0.40, 0.29),
        512: (0.63, 0.48, 0.36, 0.27),
        1024: (0.76, 0.62, 0.50, 0.40, 0.29),
        2048: (0.91, 0.77, 0.64, 0.54, 0.43, 0.33),
        4096: (1.12, 0.97, 0.84, 0.73, 0.62, 0.50, 0.37),
    }),
    "bigbird": ((8, 16, 32, 64, 128), {
        256: (0.34, 0.18),
        512: (0.43, 0.27, 0.14),
        1024: (0.55, 0.41, 0.29, 0.17),
        2048: (0.73, 0.57, 0.43, 0.32, 0.18),
        4096: (0.90, 0.76, 0.61, 0.48, 0.34),
    }),
}  # fmt: skip

#: (method, length, size) -> relative error, mean over the heads of a RoBERTa-base.
TABLE_7: dict[tuple[str, int, int], float] = {
    (method, length, size): error
    for method, (sizes, by_length) in _ROWS.items()
    for length, errors in by_length.items()
    for size, error in zip(sizes, errors, strict=False)
    if error is not None
}
