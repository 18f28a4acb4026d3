class FusedMoEExpertsModular:
    @staticmethod
    def adjust_N_for_activation(N: int, activation: object) -> int:  # noqa: N802, N803
        return N // 2
