#include "upload.cuh"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "dispatch.cuh"

namespace looksam::cuda {

namespace {

std::atomic<std::int64_t> launch_count{0};

template <class Args>
void upload_words(std::uint32_t* to, const char* from, std::size_t words, Stream stream) {
  Args args;
  args.to = to;
  args.words = static_cast<std::int32_t>(words);
  std::memcpy(args.word, from, words * sizeof(std::uint32_t));
  execute<UploadBody<Args>>("uploading the table", static_cast<std::int64_t>((words + kThreads - 1) / kThreads), args,
                            stream);
}

}  // namespace

void upload(void* to, const void* from, std::size_t bytes, Stream stream) {
  constexpr std::size_t kSmall = std::extent_v<decltype(SmallUpload::word)>,
                        kLarge = std::extent_v<decltype(LargeUpload::word)>;
  const std::size_t words = bytes / sizeof(std::uint32_t);
  for (std::size_t done = 0; done < words; done += kLarge) {
    const std::size_t count = std::min(kLarge, words - done);
    const auto upload_part = count <= kSmall ? upload_words<SmallUpload> : upload_words<LargeUpload>;
    upload_part(static_cast<std::uint32_t*>(to) + done, static_cast<const char*>(from) + done * sizeof(std::uint32_t),
                count, stream);
  }
}

void index_chunks(const ChunkMap& map, std::int32_t* row_of, std::uint32_t* row_arrivals, std::uint32_t* arrivals,
                  Stream stream) {
  execute<IndexBody>("indexing the chunks", map.rows, IndexArgs{map, row_of, row_arrivals, arrivals}, stream);
}

void count_launch() { ++launch_count; }

std::int64_t launches() { return launch_count; }

// Any kernel: all are compiled for the same architectures. This one is the smallest to compile from PTX, should that be
// needed.
std::optional<std::string> why_not_here() { return why_not_executable<UploadBody<SmallUpload>, SmallUpload>(); }

}  // namespace looksam::cuda
