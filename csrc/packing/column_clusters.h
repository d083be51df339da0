// Clusters of columns whose codes follow the same distribution.
#pragma once
#include <cstdint>
#include <vector>

#include "packing/codes.h"

namespace pgolf {

struct ColumnClusters {
  int lowest = 0;                                // the symbol of a code q is q - lowest
  int symbols = 1;                               // codes span [lowest, lowest + symbols)
  int tables = 1;                                // clusters in use
  std::vector<uint8_t> cluster;                  // [matrices * cols], of each column
  std::vector<std::vector<int64_t>> histograms;  // [tables][symbols]
};

// Splits the columns of a group's matrices so that their codes, the columns' cluster numbers and the tables together
// cost the fewest bits (entropy-constrained Lloyd iterations on code lengths, from several cluster counts).
ColumnClusters cluster_columns(const ConstMatrices& matrices, Group group);

}  // namespace pgolf
